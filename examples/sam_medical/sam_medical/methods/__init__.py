"""Fine-tuning methods: what each one puts into a model, what learns, and what of it is saved."""
