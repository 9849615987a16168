"""Training: run folders, schedules, progress, and one written-out loop for each phase."""
