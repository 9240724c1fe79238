"""A student for use elsewhere: converted, compared, and described by a model card."""
