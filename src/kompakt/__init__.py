"""Make trained neural networks small and fast, measured on the artifact that ships."""

__version__ = "0.1.0"
