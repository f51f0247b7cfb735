"""What runs inside a container: each file stands alone, copied into the run's folder. It imports nothing of ours."""
