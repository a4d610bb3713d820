"""How public functions reach an implementation: chooser, custom-call site, native module."""
