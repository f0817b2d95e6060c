"""Every figure that is claimed anywhere, measured side by side with its limit in one run."""
