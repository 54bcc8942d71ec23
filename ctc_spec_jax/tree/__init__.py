"""The shape of a draft, free of any drafting method: topology and builders, for one row."""
