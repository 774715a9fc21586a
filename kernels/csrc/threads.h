// Threads that share a call's work: OpenMP's, torch's own pool where torch was loaded first.
#pragma once
#include <stdint.h>
#include <stdlib.h>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t share(int64_t total, int64_t part, int64_t parts) { return total * part / parts; }

// Grow-only memory of one thread, for what is too large for its stack.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { free(memory); }
  void* reserve(size_t wanted) {
    if (wanted > size) {
      free(memory);
      size = (wanted + 4095) / 4096 * 4096;
      memory = aligned_alloc(64, size);
      if (!memory) size = 0;
    }
    return memory;
  }
};

bool forked = false;  // a forked child has none of the pool's threads, and OpenMP would wait for them for ever
#ifdef __unix__
[[maybe_unused]] const int watch_forks = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

#ifdef _OPENMP
// When another process takes a core, the thread there comes late by whole time slices and the others spin for it: a
// call of 0.1 ms lasts 8. A call that was lost to waiting sends those that follow to one thread, for kAlone seconds at
// first and twice as long each time that it happens again.
constexpr double kLate = 1e-3, kAlone = 0.1, kLongest = 3;
double alone_until = 0, alone_for = kAlone;
thread_local double waited = 0;

void stay_alone() {
  double seconds;
  __atomic_load(&alone_for, &seconds, __ATOMIC_RELAXED);
  const double until = omp_get_wtime() + seconds, next = seconds * 2 < kLongest ? seconds * 2 : kLongest;
  __atomic_store(&alone_until, &until, __ATOMIC_RELAXED);
  __atomic_store(&alone_for, &next, __ATOMIC_RELAXED);
}
#endif

// body(thread, threads) in every thread of a team; on one thread without any of OpenMP's cost.
template <class Body>
void parallel(int threads, const Body& body) {
#ifdef _OPENMP
  if (threads > 1 && !forked) {
    double until, worked = 0;
    __atomic_load(&alone_until, &until, __ATOMIC_RELAXED);
    const double start = omp_get_wtime();
    if (start > until) {
#pragma omp parallel num_threads(threads)
      {
        waited = 0;
        body(omp_get_thread_num(), omp_get_num_threads());
        if (omp_get_thread_num() == 0) worked = omp_get_wtime() - start - waited;
      }
      const double end = omp_get_wtime(), lost = end - start - worked;
      __atomic_load(&alone_until, &until, __ATOMIC_RELAXED);
      if (lost > kLate && lost > 4 * worked) stay_alone();
      else if (until < start) __atomic_store(&alone_for, &kAlone, __ATOMIC_RELAXED);
      return;
    }
  }
#endif
  body(0, 1);
}

// For long calls: tells a team's first thread, part by part, whether it has waited for the others longer than it worked.
// Then it goes on alone, and so do the calls that follow.
struct Watch {
#ifdef _OPENMP
  double start = omp_get_wtime(), before = waited;
  bool lost() {
    const double now = omp_get_wtime(), waiting = waited - before, working = now - start - waiting;
    start = now, before = waited;
    if (waiting <= kLate || waiting <= working) return false;
    stay_alone();
    return true;
  }
#else
  bool lost() { return false; }
#endif
};

void barrier(int threads) {
#ifdef _OPENMP
  if (threads > 1) {
    const double start = omp_get_wtime();
#pragma omp barrier
    waited += omp_get_wtime() - start;
  }
#endif
}

}  // namespace
