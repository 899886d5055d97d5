"""One file per migration; each only adds."""
