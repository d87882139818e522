"""What would look the same in another project: files, processes, settings, pictures."""
