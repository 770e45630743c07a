"""A spectrum for people to look at: pictures, loggers, tables. It knows loggers, and no trainer."""
