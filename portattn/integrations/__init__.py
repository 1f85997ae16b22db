"""portattn behind other libraries' calls; each module is imported on its own."""
