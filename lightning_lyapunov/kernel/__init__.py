"""The framework-free kernel: tensors in, growth rates of tangent vectors out. It needs torch and nothing else."""
