"""Making a machine ready: what is missing is planned, shown, done, and can be taken back."""
