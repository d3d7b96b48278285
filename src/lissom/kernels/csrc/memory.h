// Memory in huge pages where the system has them: a token reads every weight once, and with small pages looking up addresses
// takes as long as the reading (half of the bandwidth on a virtual machine).
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lissom {

// `size` bytes of zeros, which take no memory before they are touched.
class Memory {
  public:
    Memory() = default;
    explicit Memory(size_t size) {
#if defined(__linux__)
        constexpr size_t HUGE = (size_t)2 << 20;
        room_ = (size + HUGE - 1) / HUGE * HUGE + HUGE;
        base_ = mmap(nullptr, room_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) base_ = nullptr;
        if (!base_) throw std::bad_alloc();
        data_ = (uint8_t *)(((uintptr_t)base_ + HUGE - 1) / HUGE * HUGE);
        if (size >= HUGE) madvise(data_, room_ - HUGE, MADV_HUGEPAGE); // refused where there are none: no harm
#else
        base_ = std::calloc(size + 64, 1);
        if (!base_) throw std::bad_alloc();
        data_ = (uint8_t *)(((uintptr_t)base_ + 63) / 64 * 64);
#endif
    }
    ~Memory() {
        if (!base_) return;
#if defined(__linux__)
        munmap(base_, room_);
#else
        std::free(base_);
#endif
    }
    Memory(Memory &&other) noexcept { *this = static_cast<Memory &&>(other); }
    Memory &operator=(Memory &&other) noexcept {
        void *base = base_;
        uint8_t *data = data_;
        size_t room = room_;
        base_ = other.base_, data_ = other.data_, room_ = other.room_;
        other.base_ = base, other.data_ = data, other.room_ = room;
        return *this;
    }
    uint8_t *get() const { return data_; }

  private:
    void *base_ = nullptr;
    uint8_t *data_ = nullptr;
    size_t room_ = 0;
};

} // namespace lissom
