"""Objectives as pure functions: arrays in, loss and analytic gradients out."""
