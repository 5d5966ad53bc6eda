"""Where two traces differ, module by module: record a model, compare two archives."""
