"""Models of libraries, made small from their configuration classes: nothing is downloaded."""
