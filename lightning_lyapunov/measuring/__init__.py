"""What is measured of the layers of a model, along the calls that were recorded. It knows no trainer."""
