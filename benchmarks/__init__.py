"""What is measured, one command each; run them as `python -m benchmarks.<name>`."""
