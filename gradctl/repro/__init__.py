"""Write a script of one file that shows a wrong gradient."""
