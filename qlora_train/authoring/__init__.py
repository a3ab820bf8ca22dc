"""Write a new config for a base model and a data file: recipes, a look at both, choices with reasons, and the YAML text."""
