"""A run is one YAML file: reading it, carrying it out, and the folder that it leaves."""
