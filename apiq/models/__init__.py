"""Full-precision models: `source` finds one, `demo` trains a small one, `manifest` remembers which it was."""
