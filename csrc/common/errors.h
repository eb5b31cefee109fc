// What functions return beside 0 and CUDA's own codes, which are positive.
#pragma once

#define RSF_OUT_OF_RANGE (-1)
#define RSF_WORKSPACE_TOO_SMALL (-2)
#define RSF_NOT_SERVED (-3)  // take another way
#define RSF_NO_MEMORY (-4)    // on the host
#define RSF_STUCK (-100)     // under emulation alone
#define RSF_RACE (-101)      // likewise, and only where accesses are watched

#define RSF_EXPORT extern "C" __attribute__((visibility("default")))
