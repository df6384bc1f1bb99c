"""The training front end: plain functions over small typed configs, from a model folder to a model folder."""
