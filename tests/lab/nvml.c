/* Stands for NVIDIA's libnvidia-ml.so.1 in the lab: one GPU, with the facts given at compile time.
   Functions that it lacks are to its callers those of an older driver. */
#include <string.h>

struct memory { unsigned long long total, free, used; };

static int text(char *to, unsigned length, const char *from)
{
    if (strlen(from) >= length)
        return 7; /* insufficient size */
    strcpy(to, from);
    return 0;
}

int nvmlInitWithFlags(unsigned flags) { (void)flags; return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { (void)code; return "not in the lab"; }
int nvmlSystemGetDriverVersion(char *to, unsigned length) { return text(to, length, DRIVER); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{
    *device = (void *)&nvmlShutdown;
    return index ? 2 : 0; /* invalid argument */
}
int nvmlDeviceGetName(void *device, char *to, unsigned n) { (void)device; return text(to, n, NAME); }
int nvmlDeviceGetUUID(void *device, char *to, unsigned n) { (void)device; return text(to, n, UUID); }
int nvmlDeviceGetMemoryInfo(void *device, struct memory *memory)
{
    (void)device;
    memory->total = TOTAL;
    memory->free = FREE;
    memory->used = TOTAL - FREE;
    return 0;
}
/* It works, and it is hot. */
int nvmlDeviceGetUtilizationRates(void *device, unsigned rates[2])
{
    (void)device;
    rates[0] = 37;
    rates[1] = 12;
    return 0;
}
int nvmlDeviceGetTemperature(void *device, unsigned sensor, unsigned *celsius)
{
    (void)device;
    *celsius = 93;
    return sensor ? 2 : 0;
}
int nvmlDeviceGetCurrentClocksEventReasons(void *device, unsigned long long *bits)
{
    (void)device;
    *bits = 0x40; /* slowed down by the hardware, for heat */
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor)
{
    (void)device;
    *major = MAJOR;
    *minor = MINOR;
    return 0;
}
/* No process uses it: whatever runs here computes on the CPU. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, void *processes)
{
    (void)device;
    (void)processes;
    *count = 0;
    return 0;
}
