"""A finished mixture outside of a cluster: used in Python, exported as diffusers models, pushed to and pulled from the hub."""
