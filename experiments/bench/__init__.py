"""Speed beside other programs, measured in the same run, and beside what the machine's matmul rate allows."""
