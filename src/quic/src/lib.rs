//! Sans-IO driver over quinn-proto: datagrams and time in, datagrams and stream events out.
