"""The units of ``gradctl check`` on the workers of a Dask cluster, each still in a process of its own."""
