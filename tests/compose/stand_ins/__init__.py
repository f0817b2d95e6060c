"""Build local images with the names of public ones, for machines that cannot pull images; see ``__main__``."""
