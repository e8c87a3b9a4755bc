"""Measuring: `sdft bench`, single roles and parts by themselves, and every figure of a GPU."""
