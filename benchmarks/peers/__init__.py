"""The same workloads on this project and on other engines, on one machine and in one run."""
