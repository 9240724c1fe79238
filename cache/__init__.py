"""The offline stage: image sources, views, teachers, and the store of what the teachers said."""
