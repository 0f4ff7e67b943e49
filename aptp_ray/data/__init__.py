"""Ray Data shells: sources of captioned images, their encoding, and their assignment to experts.

Imports nothing, so that ``aptp_ray.data.schema`` can be read without Ray.
"""
