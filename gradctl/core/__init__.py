"""The words every layer shares: names, errors, and the report's data. Imports nothing of gradctl, and not torch."""
