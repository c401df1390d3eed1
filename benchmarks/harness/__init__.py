"""Timing, processes and the machine: what every measurement needs."""
