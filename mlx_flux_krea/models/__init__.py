"""Networks: functions of arrays, with their sizes. They read no file, print nothing and draw no random number."""
