"""Helpers of legalize-trt."""
