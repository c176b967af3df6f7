"""The strongest existing systems put to the same work as Vitrine, in one run."""
