"""Local images under the names of public ones, for machines that can pull none; see ``__main__``."""
