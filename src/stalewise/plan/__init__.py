"""Where to cut a model into stages: what each layer costs, and the split that costs least."""
