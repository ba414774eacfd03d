//! Tests of Generation as a whole: real processes, real faults, fences.
