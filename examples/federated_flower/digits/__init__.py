"""Digits of scikit-learn, learnt by two clients: an app of Flower that kompakt compresses."""
