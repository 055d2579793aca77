"""Tests of the recipes: networks, data modules, the classifier and their configurations."""
