"""Tests of sae."""
