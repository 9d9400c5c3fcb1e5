"""What every other package stands on: files, seeds, errors, progress, the project's place."""
