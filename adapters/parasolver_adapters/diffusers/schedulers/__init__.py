"""Schedulers of diffusers as step rules."""
