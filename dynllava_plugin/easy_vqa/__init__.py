"""easy-VQA: real images and questions from PyPI, made into training data and benchmarks."""
