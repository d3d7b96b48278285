// A small pool: `run` executes one function on all threads (the caller is thread 0). Threads that wait
// spin for some microseconds, because a decode step has hundreds of barriers, and then sleep.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define LISSOM_PAUSE() _mm_pause()
#else
#define LISSOM_PAUSE() ((void)0)
#endif

namespace lissom {

class Pool {
  public:
    explicit Pool(int threads) : threads_(threads < 1 ? 1 : threads) {
        for (int i = 1; i < threads_; i++) workers_.emplace_back([this, i] { work(i); });
    }
    ~Pool() {
        stop_ = true;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (auto &w : workers_) w.join();
    }
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const { return threads_; }

    void run(const std::function<void(int)> &f) {
        if (threads_ == 1) return f(0);
        job_ = &f;
        done_ = 0;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        f(0);
        for (int spin = 0; done_.load(std::memory_order_acquire) != threads_ - 1; spin++) relax(spin);
    }

    // all threads of the current `run` meet here
    void barrier() {
        if (threads_ == 1) return;
        const uint32_t phase = phase_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            return;
        }
        for (int spin = 0; phase_.load(std::memory_order_acquire) == phase; spin++) relax(spin);
    }

  private:
    static void relax(int spin) {
        if (spin < 4000)
            LISSOM_PAUSE();
        else
            std::this_thread::yield(); // another process may have our core
    }

    void work(int i) {
        uint32_t seen = 0;
        for (;;) {
            for (int spin = 0; epoch_.load(std::memory_order_acquire) == seen && spin < 20000; spin++) LISSOM_PAUSE();
            epoch_.wait(seen);
            seen++;
            if (stop_) return;
            (*job_)(i);
            done_.fetch_add(1, std::memory_order_acq_rel);
        }
    }

    int threads_;
    std::vector<std::thread> workers_;
    const std::function<void(int)> *job_ = nullptr;
    std::atomic<uint32_t> epoch_{0}, phase_{0};
    std::atomic<int> arrived_{0}, done_{0};
    std::atomic<bool> stop_{false};
};

// Hands out ranges of a loop to whichever thread comes first.
struct Ticket {
    std::atomic<int> next{0};
    bool take(int total, int step, int &from, int &to) {
        from = next.fetch_add(step, std::memory_order_relaxed);
        to = from + step < total ? from + step : total;
        return from < total;
    }
    // Large ranges first, small ones at the end, so that `threads` threads end together.
    bool guided(int total, int threads, int &from, int &to) {
        from = next.load(std::memory_order_relaxed);
        do {
            if (from >= total) return false;
            const int step = (total - from) / (4 * threads);
            to = from + (step > 0 ? step : 1);
        } while (!next.compare_exchange_weak(from, to, std::memory_order_relaxed));
        return true;
    }
};

} // namespace lissom
