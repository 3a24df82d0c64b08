"""Training: one loop for teachers, matchers and students, on Accelerate."""
