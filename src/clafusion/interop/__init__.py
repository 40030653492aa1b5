"""Networks, data and names of other libraries, which are imported when they are needed."""
