"""How public functions reach an implementation: the chooser, the custom-call site, the native module."""
